// Blocks of 4-bit indices into a code book, on all threads.
#include "ops.h"

namespace olmoe {

// 128 kB of fp32, so that what a thread reads and writes fits into its cache.
constexpr int kTaskBlocks = 512;

void decode_book(const uint8_t* codes, const float* scales, int blocks, const float* book, Type type, void* out) {
  const Kernels& k = kernels();
  pool().run(blocks, kTaskBlocks, [&](int begin, int end, int) {
    k.decode_book(codes + size_t(begin) * kBookBlock / 2, scales + begin, end - begin, book, type,
                  static_cast<uint8_t*>(out) + size_t(begin) * kBookBlock * sizeof_type(type));
  });
}

void encode_book(const void* x, Type type, int blocks, const float* bounds, const uint8_t* numbers, uint8_t* codes,
                 float* scales) {
  const Kernels& k = kernels();
  pool().run(blocks, kTaskBlocks, [&](int begin, int end, int) {
    k.encode_book(static_cast<const uint8_t*>(x) + size_t(begin) * kBookBlock * sizeof_type(type), type, end - begin,
                  bounds, numbers, codes + size_t(begin) * kBookBlock / 2, scales + begin);
  });
}

}  // namespace olmoe
