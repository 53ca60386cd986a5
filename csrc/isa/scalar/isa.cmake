# Whatever the compiler's baseline is: SSE2 on x86-64, NEON on aarch64.
set(isa_processors ".*")
set(isa_rank 0)
set(isa_flags "")
