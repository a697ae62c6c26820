// The matrix units, words between thread blocks, and clusters of these: the instructions that CUDA's language
// has no function for. On the CPU tests/cpp/cuda_on_cpu.h and mma_on_cpu.h do what they do.
#pragma once
#include <cstring>

#include "device.h"
#ifndef __CUDACC__
#include "mma_on_cpu.h"
#endif

#ifndef ULMFIT_PERSISTENT_PARTS
#define ULMFIT_PERSISTENT_PARTS 15
#elif !defined(ULMFIT_ONLY_BF16)  // as benchmarks/lstm_parts.py compiles them, to time the others
#error \
    "without some of its parts the persistent recurrence computes nonsense: they are left out only to be timed"
#endif

namespace ulmfit_fast::cuda {

constexpr bool kWaits = ULMFIT_PERSISTENT_PARTS & 1;     // of blocks for one another
constexpr bool kExchange = ULMFIT_PERSISTENT_PARTS & 2;  // loads of h and dgates
constexpr bool kProducts = ULMFIT_PERSISTENT_PARTS & 4;
constexpr bool kClusters = ULMFIT_PERSISTENT_PARTS & 8;       // where the device has them
constexpr bool kRelaxedPolls = ULMFIT_PERSISTENT_PARTS & 16;  // of flags, and one acquire when they have come

using Fragment = Pack<uint32_t, 4>;  // what a lane loads at once: 8 elements of 16 bits or 4 of 32

// What an architecture lacks is not compiled for it. A kernel that needs it stops its launch: the plan asks
// for none there, and results that nobody wrote must not pass for results.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kMatrixUnitsCompiled = false;
#else
constexpr bool kMatrixUnitsCompiled = true;
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kClustersCompiled = false;
#else
constexpr bool kClustersCompiled = true;
#endif

// What the matrix units take for value: float32 as TF32, which keeps 10 bits of the fraction; to nearest.
inline __device__ bf16 as_operand(bf16 value) { return value; }
inline __device__ f16 as_operand(f16 value) { return value; }
inline __device__ float as_operand(float value) {
#ifndef __CUDACC__
  return tf32_on_cpu(value);
#elif __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
#else
  return value;
#endif
}

// c (16, 8) += a (16, K) b (K, 8), spread over a warp as mma.sync.m16n8k16 wants it, or for S = float, which
// as_operand has rounded, m16n8k8.
template <class S>
__device__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifndef __CUDACC__
  mma_on_cpu<S>(c, a, b, [](S value) { return widen(value); });
#elif __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<S, bf16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (std::is_same_v<S, float>) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// c (16, 8) += a (16, chunk) b (chunk, 8). Which elements of K meet in which instruction does not matter as
// long as it is the same for a and b.
template <class S>
__device__ void mma_chunk(float (&c)[4], const Fragment (&a)[2], const Fragment& b) {
  mma<S>(c, a[0].v, {b.v[0], b.v[1]});
  mma<S>(c, a[1].v, {b.v[2], b.v[3]});
}

// Past the first level of cache, which does not know what other multiprocessors wrote. volatile: the compiler
// must not move it before the wait for the data.
template <class T>
__device__ T load_shared_by_card(const T* from) {
#ifdef __CUDACC__
  T to;
  if constexpr (sizeof(T) == 16) {
    auto* v = reinterpret_cast<uint32_t*>(&to);
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
                 : "l"(from));
  } else {
    static_assert(sizeof(T) == 8);
    auto* v = reinterpret_cast<uint32_t*>(&to);
    asm volatile("ld.global.cg.v2.u32 {%0,%1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "l"(from));
  }
  return to;
#else
  return *from;
#endif
}

// 4 bytes from global to shared memory, while the thread goes on; finish_copies waits for all of a thread's
// own.
inline __device__ void start_copy(uint32_t* to, const void* from) {
#ifndef __CUDACC__
  std::memcpy(to, from, 4);
#elif __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
               :
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(to))), "l"(from)
               : "memory");
#endif
}
inline __device__ void finish_copies() {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" : : : "memory");
#endif
}

// A flag counts what a block has finished. publish: all that the block's threads wrote before its last
// __syncthreads() is seen by whoever sees the flag. By one thread.
inline __device__ void publish(Flag* flag, unsigned value) {
#ifdef __CUDACC__
  asm volatile("st.release.gpu.global.u32 [%0], %1;" : : "l"(&flag->count), "r"(value) : "memory");
#else
  flag->count = value;
#endif
}

// A cluster: neighbouring blocks that run side by side and reach each other's shared memory. Its barrier has
// two halves: what a block's threads wrote before they arrived is seen by those that have waited.
inline __device__ void arrive_at_cluster() {
#ifndef __CUDACC__
  BlocksOnCpu::current()->arrive_at_cluster();
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" : : : "memory");
#endif
}
inline __device__ void wait_for_cluster() {
#ifndef __CUDACC__
  BlocksOnCpu::current()->wait_for_cluster();
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" : : : "memory");
#endif
}

// What lies at `from`, in this block's shared memory, in that of block `rank` of the cluster.
template <class T>
__device__ T load_from_cluster(const T* from, int rank) {
  static_assert(sizeof(T) == 8);
#ifndef __CUDACC__
  return *BlocksOnCpu::current()->in_cluster(from, rank);
#else
  T to = {};
#if __CUDA_ARCH__ >= 900
  auto* v = reinterpret_cast<uint32_t*>(&to);
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(there)
      : "r"(static_cast<unsigned>(__cvta_generic_to_shared(from))), "r"(rank));
  asm volatile("ld.shared::cluster.v2.u32 {%0,%1}, [%2];" : "=r"(v[0]), "=r"(v[1]) : "r"(there) : "memory");
#endif
  return to;
#endif
}

#ifdef __CUDACC__
// relaxed: what the flag's block wrote before it published need not be seen yet.
inline __device__ unsigned poll(const Flag* flag, bool relaxed) {
  unsigned count;
  if (relaxed) {
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(&flag->count) : "memory");
  } else {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(&flag->count) : "memory");
  }
  return count;
}
#endif

// By a whole warp: until the flags from first to end - 1 have all counted to `value`. A wait that takes
// longer than any launch may, some 20 seconds, is an error of ours: it ends the launch as an assertion does.
inline __device__ void wait_for_flags(const Flag* flags, int first, int end, unsigned value) {
  if (!kWaits) return;
  const int lane = threadIdx.x % kWarp;
  for (int f = first + lane; f < end; f += kWarp) {
#ifdef __CUDACC__
    constexpr int kMostPolls = 1 << 25;
    for (int polls = 0; poll(flags + f, kRelaxedPolls) < value; ++polls) {
      ULMFIT_DEVICE_CHECK(polls < kMostPolls,
                          "ulmfit_fast.lstm: a block of a persistent launch is not heard of");
    }
    if (kRelaxedPolls) poll(flags + f, /*relaxed=*/false);
#else
    BlocksOnCpu::current()->wait_for(&flags[f].count, value);
#endif
  }
  __syncwarp();
}

}  // namespace ulmfit_fast::cuda
