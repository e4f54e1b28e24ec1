// Tiles of AMX as the register tiles of block-sparse products: 32 by 32 sums in four of its registers.
//
// In assembly: GCC's intrinsics do not say that they read memory, and nothing here is compiled for processors that have
// AMX alone. The system is asked for the permission by variant.cpp.
#pragma once
#include "cpu/block_tiles.h"

#if defined(__AVX512BF16__)
namespace kdfast::KDFAST_VARIANT {

struct AmxPairs : Pairs {
  static constexpr bool kAmx = true;
  static constexpr int64_t kChunk = 64, kPanelRows = 1024;
};

struct __attribute__((aligned(64))) AmxConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t columns[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// The tile registers of a thread, for as long as it lives.
template <class P>
struct Registers {
  Registers() {
    if constexpr (P::kAmx) {
      static const AmxConfig config;
      asm volatile("ldtilecfg %0" ::"m"(config));
    }
  }
  ~Registers() {
    if constexpr (P::kAmx) asm volatile("tilerelease");
  }
};

#define KDFAST_TILE_LOAD(t, p, bytes) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #t::"r"(p), "r"(int64_t(bytes)) : "memory")
#define KDFAST_TILE_STORE(t, p, bytes) \
  asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(p), "r"(int64_t(bytes)) : "memory")
#define KDFAST_TILE_PRODUCT(c, a, b) asm volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c::)
#define KDFAST_TILE_ZERO(t) asm volatile("tilezero %%tmm" #t::)

KDFAST_LOCAL void amx_tile(const Tile<AmxPairs>& t) {
  const int64_t c_row = 4 * t.c_row;
  float* below = t.c + 16 * t.c_row;
  if (t.add) {
    KDFAST_TILE_LOAD(0, t.c, c_row);
    KDFAST_TILE_LOAD(1, t.c + 16, c_row);
    KDFAST_TILE_LOAD(2, below, c_row);
    KDFAST_TILE_LOAD(3, below + 16, c_row);
  } else {
    KDFAST_TILE_ZERO(0);
    KDFAST_TILE_ZERO(1);
    KDFAST_TILE_ZERO(2);
    KDFAST_TILE_ZERO(3);
  }
  for (int64_t n = 0; n < t.count; ++n) {
    const char* a = t.a + (t.index ? t.index[n] : 0) * t.a_block;
    const float* w = t.w + n * t.w_block;
    for (int64_t q = 0; q < t.words; q += 16, a += 64, w += 256) {
      KDFAST_TILE_LOAD(6, w, 64);
      KDFAST_TILE_LOAD(4, a, t.a_row);
      KDFAST_TILE_PRODUCT(0, 4, 6);
      KDFAST_TILE_LOAD(7, w + t.w_step.group, 64);
      KDFAST_TILE_PRODUCT(1, 4, 7);
      KDFAST_TILE_LOAD(5, a + 16 * t.a_row, t.a_row);
      KDFAST_TILE_PRODUCT(2, 5, 6);
      KDFAST_TILE_PRODUCT(3, 5, 7);
    }
  }
  KDFAST_TILE_STORE(0, t.c, c_row);
  KDFAST_TILE_STORE(1, t.c + 16, c_row);
  KDFAST_TILE_STORE(2, below, c_row);
  KDFAST_TILE_STORE(3, below + 16, c_row);
}

// Rows are whole tiles of 32; those beyond the caller's are not meant.
template <>
inline void products<AmxPairs>(const Tile<AmxPairs>& t, int64_t rows, int64_t width) {
  for (int64_t p = 0; p < width; p += 32) {
    for (int64_t m = 0; m < rows; m += 32) {
      Tile<AmxPairs> at = t;
      at.a += m * t.a_row, at.w += p / 16 * t.w_step.group, at.c += m * t.c_row + p;
      amx_tile(at);
    }
  }
}

}  // namespace kdfast::KDFAST_VARIANT
#else
namespace kdfast::KDFAST_VARIANT {
template <class P>
struct Registers {};
}  // namespace kdfast::KDFAST_VARIANT
#endif
