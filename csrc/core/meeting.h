// Where processes that share memory wait for each other.
#pragma once

#include <cstdint>

namespace olmoe {

// Bytes from one process's counter to the next one's: each has a cache line, or two, of its own.
constexpr int kCounterBytes = 128;

// Raise the counter of process `rank` to `turn`, and wait for the others' at most so many seconds. Whose is still below
// then, or -1: all have come, and what they wrote before is there to be read.
int meet(void* counters, int processes, int rank, int64_t turn, double seconds);

}  // namespace olmoe
