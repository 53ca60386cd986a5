# AVX-512 with VNNI and bf16: servers since 2020, and AMD's processors since 2022.
set(isa_processors "x86_64|AMD64|amd64")
set(isa_rank 20)
set(isa_flags -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512bf16
  # GCC warns of its own headers' deliberate use of undefined registers.
  -Wno-maybe-uninitialized -Wno-uninitialized)
