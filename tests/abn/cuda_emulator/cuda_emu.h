// Runs CUDA C++ kernels on the CPU, one block at a time, every CUDA thread a fiber.
// A fiber runs until it meets a barrier, a shuffle or its end, so the order in which threads run is the engine's choice
// (cuda_emu.cpp), and can be varied to bring ordering bugs out. Included before kernel text, which stays as it is.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

// ---- language
#define __CUDACC__ 1
#define CUDA_EMU 1
#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// One OS thread runs every fiber of a block, so thread-local storage is shared storage, and the library's TLS image is
// exactly its shared memory (poisoned before each block). AddressSanitizer puts red zones around plain statics but not
// around TLS.
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

struct uint3 { unsigned x, y, z; };

namespace emu {
enum State { READY, AT_BARRIER, AT_SHUFFLE, DONE };
struct Fiber;
struct Thread {
  uint3 tid;
  State state;
  const char* site;  // where it waits
  unsigned lane, warp, mask;
  int source;        // of a shuffle: the lane it reads, what it gives, what it gets
  uint64_t in, out;
  Fiber* fiber;
};
struct View { Thread* cur; uint3 bid, block, grid; };
extern View V;
void barrier(const char* site);
void shuffle(unsigned mask, uint64_t in, int source, const char* site);
void trap(const char* site);
void count(uintptr_t at, unsigned bytes, bool stored);  // a global access, for emu_watch
int launch(void (*entry)(void**), void** args, const int* dims, int order, long long only_block);

template <typename T> inline uint64_t bits(T v) {
  static_assert(sizeof(T) <= 8, "more than 8 bytes");
  uint64_t b = 0;
  memcpy(&b, &v, sizeof v);
  return b;
}
template <typename T> inline T unbits(uint64_t b) {
  T v;
  memcpy(&v, &b, sizeof v);
  return v;
}
template <typename T> inline T shuffle_xor(unsigned mask, T v, int distance, const char* site) {
  const int lane = (int)V.cur->lane, other = lane ^ distance;
  shuffle(mask, bits(v), other > 31 ? lane : other, site);
  return unbits<T>(V.cur->out);
}

// What a kernel takes: for each parameter 100 * kind + bytes, kind 0 integer, 1 floating point, 2 pointer.
template <typename A> inline int describe() {
  return 100 * (std::is_pointer<A>::value ? 2 : std::is_floating_point<A>::value ? 1 : 0) + (int)sizeof(A);
}
template <typename F> struct Call;
template <typename... A> struct Call<void (*)(A...)> {
  template <void (*K)(A...), size_t... I> static void go(void** a, std::index_sequence<I...>) {
    K(*static_cast<std::remove_reference_t<A>*>(a[I])...);
  }
  template <void (*K)(A...)> static void entry(void** a) { go<K>(a, std::index_sequence_for<A...>{}); }
  static int parameters(int* out) {
    int n = 0;
    ((out[n++] = describe<A>()), ...);
    return n;
  }
};
}  // namespace emu

// ---- built-in variables, barriers, warp functions
#define threadIdx (emu::V.cur->tid)
#define blockIdx (emu::V.bid)
#define blockDim (emu::V.block)
#define gridDim (emu::V.grid)
#define EMU_STR2(x) #x
#define EMU_STR(x) EMU_STR2(x)
#define EMU_AT(name) name " at line " EMU_STR(__LINE__)
#define __syncthreads() emu::barrier(EMU_AT("__syncthreads"))
inline int __float_as_int(float v) { return (int)emu::bits(v); }
inline float __int_as_float(int v) { return emu::unbits<float>((uint32_t)v); }
inline long long __double_as_longlong(double v) { return (long long)emu::bits(v); }
inline double __longlong_as_double(long long v) { return emu::unbits<double>((uint64_t)v); }
#define __shfl_xor_sync(mask, v, distance) emu::shuffle_xor(mask, v, distance, EMU_AT("__shfl_xor_sync"))

// ---- export a kernel (or one instance of a template) under a number
#define EMU_EXPORT(i, ...) \
  extern "C" int emu_run_##i(void** a, const int* d, int order, long long only) { \
    return emu::launch(&emu::Call<decltype(&__VA_ARGS__)>::entry<&__VA_ARGS__>, a, d, order, only); \
  } \
  extern "C" int emu_parameters_##i(int* out) { return emu::Call<decltype(&__VA_ARGS__)>::parameters(out); }
