// Whether this CPU has the instruction set. A file of its own, which is compiled without its flags.
namespace olmoe {

bool avx2_runs() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

}  // namespace olmoe
