// What is known about each packed format, in one trait each: everything else asks here, Python included, which reads
// names, types and bytes of blocks from the extension. A new format is a number in `Type`, a trait, its place in
// `kPackedTypes` and `with_packed`, and, where an instruction set has a faster way to its codes than `code`, an
// `unpack` there (isa/*/packed_tiles.h).
//
// A block of a group is kGroup rows of kBlock columns of unsigned codes, the value of a code c being c - zero. Formats
// of 4 and 5 bits have the codes of columns 4j..4j+3 in the lower and of columns 16+4j..16+4j+3 in the upper halves of
// bytes 64j + 4 * row + 0..3 from kNibblesAt on; olmoe/quant/formats/blocks.py says the same.
#pragma once

#include <cstddef>
#include <cstdint>

namespace olmoe {

constexpr int kBlock = 32;         // columns that share a scale
constexpr int kGroup = 16;         // rows that are stored interleaved
constexpr int kBand = 4 * kGroup;  // rows that are read side by side: four streams reach more bandwidth than one

// kI8 is only for caches: rows of signed bytes, each with a scale that is stored separately (core/cache.h).
enum class Type : int { kF32 = 0, kBF16 = 1, kF16 = 2, kQ8 = 3, kQ4 = 4, kQ5 = 5, kI8 = 6 };

// Bytes of one number of a plain matrix or cache.
constexpr int sizeof_type(Type type) { return type == Type::kF32 ? 4 : type == Type::kI8 ? 1 : 2; }

template <Type TYPE, int BITS>
struct PackedOf {
  static constexpr Type kType = TYPE;
  static constexpr int kBits = BITS;
  static constexpr int kZero = 1 << (BITS - 1);
  static constexpr int kCodeBytes = kGroup * kBlock * BITS / 8;  // of one block of a group
  static constexpr int kScaleBytes = 2 * kGroup;
  static constexpr int kBlockBytes = (kCodeBytes + kScaleBytes) / kGroup;  // of one row, as in GGUF
  static constexpr size_t group_bytes(int blocks) { return size_t(blocks) * (kCodeBytes + kScaleBytes); }
};

// The lower four bits of a code in the formats of 4 and 5 bits.
constexpr int nibble(const uint8_t* nibbles, int row, int column) {
  const int byte = nibbles[64 * (column % 16 / 4) + 4 * row + column % 4];
  return column < 16 ? byte & 15 : byte >> 4;
}

template <Type T>
struct Packed;

template <>
struct Packed<Type::kQ8> : PackedOf<Type::kQ8, 8> {
  static constexpr const char* kName = "q8_0";
  static constexpr int code(const uint8_t* block, int row, int column) {
    return block[64 * (column / 4) + 4 * row + column % 4];
  }
};

template <>
struct Packed<Type::kQ4> : PackedOf<Type::kQ4, 4> {
  static constexpr const char* kName = "q4_0";
  static constexpr int kNibblesAt = 0;
  static constexpr int code(const uint8_t* block, int row, int column) { return nibble(block, row, column); }
};

// First 8 words of 64 bits, bit 4 * row + i of word j the fifth bit of column 4j+i; then the other four, as kQ4 has
// them.
template <>
struct Packed<Type::kQ5> : PackedOf<Type::kQ5, 5> {
  static constexpr const char* kName = "q5_0";
  static constexpr int kNibblesAt = 64;
  static constexpr int code(const uint8_t* block, int row, int column) {
    const int bit = 4 * row + column % 4;
    const int fifth = block[8 * (column / 4) + bit / 8] >> bit % 8 & 1;
    return nibble(block + kNibblesAt, row, column) | fifth << 4;
  }
};

constexpr Type kPackedTypes[] = {Type::kQ8, Type::kQ4, Type::kQ5};

// f.operator()<Packed<T>>() for a packed type that is known only now.
template <typename Function>
constexpr decltype(auto) with_packed(Type type, Function f) {
  switch (type) {
    case Type::kQ4: return f.template operator()<Packed<Type::kQ4>>();
    case Type::kQ5: return f.template operator()<Packed<Type::kQ5>>();
    default: return f.template operator()<Packed<Type::kQ8>>();
  }
}

constexpr bool is_packed(Type type) { return type >= Type::kQ8 && type != Type::kI8; }
constexpr int zero_of(Type type) {
  return with_packed(type, []<typename Format>() { return Format::kZero; });
}
// Bytes of kGroup rows.
constexpr size_t packed_group_bytes(Type type, int blocks) {
  return with_packed(type, [&]<typename Format>() { return Format::group_bytes(blocks); });
}

}  // namespace olmoe
