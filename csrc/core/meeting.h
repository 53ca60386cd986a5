// Where processes that share memory wait for each other.
#pragma once

#include <cstdint>

namespace olmoe {

// Bytes from one process's counter to the next one's: each has cache lines of its own.
constexpr int kCounterBytes = 128;

// Whether process `rank` has left, as no other one holds a lock on that byte of the file. Whoever asks about itself is
// told so, too.
bool has_left(int file, int rank);

// Raise the counter of process `rank` to `turn`, and wait for the others' for at most so many seconds, or until one has
// left. Whose counter is still below then, or -1: all have come, and what they wrote before is there to be read.
int meet(void* counters, int file, int processes, int rank, int64_t turn, double seconds);

}  // namespace olmoe
