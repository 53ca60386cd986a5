// Fetching weights ahead of their use.
#pragma once

#include "simd.h"

namespace olmoe {
namespace {

// Fetch a part of `bytes` into the second cache, the lines of slot number `slot` of `slots`. Where few tokens make
// memory what counts, the hardware's own prefetching is too late: it stops at the ends of pages and at the scales of
// each group. So while a thread reads some groups, it fetches those that it reads next, in one stream from end to end,
// block by block the part that takes as long. Spread over the block's work, because the CPU drops some of many at once;
// `sum`, which each seems to change, keeps the compiler from gathering them.
template <typename Vector>
OLMOE_INLINE void fetch(const uint8_t* address, int bytes, int slot, int slots, Vector& sum) {
  const int lines = (bytes + 63) / 64;
  for (int line = slot * lines / slots; line < (slot + 1) * lines / slots; line++)
    asm volatile("prefetcht1 %1" : "+v"(sum) : "m"(address[64 * line]));
}

}  // namespace
}  // namespace olmoe
