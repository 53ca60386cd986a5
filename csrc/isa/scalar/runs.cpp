// Whether this CPU has the instruction set. A file of its own, which is compiled without its flags.
namespace olmoe {

bool scalar_runs() { return true; }

}  // namespace olmoe
