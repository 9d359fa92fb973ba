// The AMX tile instructions that the products use: the real ones, or the same in software.
//
// OPENMIMO_EMULATE_AMX builds the software form on any machine, so that the tile path is tested where there is no AMX.
#pragma once

#include <cstdint>
#include <cstring>

// The two forms have names of their own, so that one library can hold both.
#if defined(OPENMIMO_EMULATE_AMX)
#define OPENMIMO_AMX 1
#define OPENMIMO_AMX_FORM soft_amx
#elif defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__) && defined(__AVX512BF16__)
#define OPENMIMO_AMX 1
#define OPENMIMO_AMX_FORM real_amx
#include <sys/syscall.h>
#include <unistd.h>
#endif

#ifdef OPENMIMO_AMX

namespace openmimo {
inline namespace OPENMIMO_AMX_FORM {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

#ifdef OPENMIMO_EMULATE_AMX

inline float float_of_upper_half(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

struct SoftTiles {
  TileConfig config;
  alignas(64) uint8_t data[8][16][64];
};
inline thread_local SoftTiles soft_tiles;

inline bool request_tiles() { return true; }
inline void tile_load_config(const TileConfig& config) {
  soft_tiles.config = config;
  std::memset(soft_tiles.data, 0, sizeof(soft_tiles.data));
}
inline void tile_release() { tile_load_config(TileConfig{}); }

template <int T>
inline void tile_zero() {
  std::memset(soft_tiles.data[T], 0, sizeof(soft_tiles.data[T]));
}
template <int T>
inline void tile_load(const void* from, int64_t stride_bytes) {
  tile_zero<T>();
  for (int i = 0; i < soft_tiles.config.rows[T]; ++i)
    std::memcpy(soft_tiles.data[T][i], static_cast<const char*>(from) + i * stride_bytes,
                soft_tiles.config.column_bytes[T]);
}
template <int T>
inline void tile_store(void* to, int64_t stride_bytes) {
  for (int i = 0; i < soft_tiles.config.rows[T]; ++i)
    std::memcpy(static_cast<char*>(to) + i * stride_bytes, soft_tiles.data[T][i], soft_tiles.config.column_bytes[T]);
}
// C[m][n] += sum over k of A[m][2k] * B[k][2n] + A[m][2k + 1] * B[k][2n + 1], even and odd terms summed apart.
template <int C, int A, int B>
inline void tile_dot() {
  const TileConfig& config = soft_tiles.config;
  for (int m = 0; m < config.rows[C]; ++m) {
    uint16_t a[32];
    float c[16], even[16] = {}, odd[16] = {};
    std::memcpy(a, soft_tiles.data[A][m], 64);
    std::memcpy(c, soft_tiles.data[C][m], 64);
    for (int k = 0; k < config.column_bytes[A] / 4; ++k) {
      uint16_t b[32];
      std::memcpy(b, soft_tiles.data[B][k], 64);
      for (int n = 0; n < config.column_bytes[C] / 4; ++n) {
        even[n] += float_of_upper_half(a[2 * k]) * float_of_upper_half(b[2 * n]);
        odd[n] += float_of_upper_half(a[2 * k + 1]) * float_of_upper_half(b[2 * n + 1]);
      }
    }
    for (int n = 0; n < config.column_bytes[C] / 4; ++n) c[n] += even[n] + odd[n];
    std::memcpy(soft_tiles.data[C][m], c, 64);
  }
}
// C[m][n] += sum over k and the four bytes of a word of A[m][4k + i], signed, times B[k][4n + i], unsigned.
template <int C, int A, int B>
inline void tile_dot_bytes() {
  const TileConfig& config = soft_tiles.config;
  for (int m = 0; m < config.rows[C]; ++m) {
    int8_t a[64];
    int32_t c[16];
    std::memcpy(a, soft_tiles.data[A][m], 64);
    std::memcpy(c, soft_tiles.data[C][m], 64);
    for (int k = 0; k < config.column_bytes[A] / 4; ++k) {
      const uint8_t* b = soft_tiles.data[B][k];
      for (int n = 0; n < config.column_bytes[C] / 4; ++n)
        for (int i = 0; i < 4; ++i) c[n] += int32_t{a[4 * k + i]} * int32_t{b[4 * n + i]};
    }
    std::memcpy(soft_tiles.data[C][m], c, 64);
  }
}

#else

// Linux hands out the tile state on request only. Once granted it holds for all threads of the process.
inline bool request_tiles() {
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
// Written as assembly because g++'s intrinsics take literals only as tile numbers and do not say which memory they read.
inline void tile_load_config(const TileConfig& config) {
  asm volatile("ldtilecfg %0" ::"m"(config) : "memory");
}
inline void tile_release() { asm volatile("tilerelease" ::: "memory"); }

template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void tile_load(const void* from, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* to, int64_t stride_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(T) : "memory");
}
template <int C, int A, int B>
inline void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
inline void tile_dot_bytes() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace OPENMIMO_AMX_FORM
}  // namespace openmimo

#endif
