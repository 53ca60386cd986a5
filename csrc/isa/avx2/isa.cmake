# AVX2 with FMA and F16C: most of x86 since 2013.
set(isa_processors "x86_64|AMD64|amd64")
set(isa_rank 10)
set(isa_flags -mavx2 -mfma -mf16c)
