// Launching, checked. Without nvcc the same kernels run on the CPU, one thread block after the other: so
// they are tested on machines that have no GPU (tests/cpp/cuda_on_cpu.h).
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#include "kernels.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#undef NDEBUG  // a wrong id or length must not pass in a release build
#include <cassert>
#define ULMFIT_DEVICE_CHECK(condition, message) assert((condition) && message)
#define ULMFIT_UNROLL _Pragma("unroll 4")    // loads in flight
#define ULMFIT_UNROLL_ALL _Pragma("unroll")  // arrays indexed by the loop stay in registers
#else
#include "cuda_on_cpu.h"
#endif

namespace ulmfit_fast::cuda {

constexpr int kWarp = 32;
constexpr int64_t kMostBlocks = INT32_MAX, kMostBlocksY = 65535;  // CUDA's limits for a grid's sizes

// The blocks of a launch, in 64 bits, so that too many are noticed and not cut to fewer.
struct Grid {
  int64_t x, y = 1;
};

#ifdef __CUDACC__
inline void check(const char* name, cudaError_t error) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // whoever catches this and launches something else is not to find the error
    throw std::runtime_error(std::string("ulmfit_fast.") + name +
                             ": CUDA error at launch: " + cudaGetErrorString(error));
  }
}
#endif

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), Grid blocks, dim3 block, void* stream, A... arguments) {
  if (blocks.x == 0 || blocks.y == 0) return;  // no elements: CUDA would call it an error
  if (blocks.x > kMostBlocks || blocks.y > kMostBlocksY)
    throw std::runtime_error(std::string("ulmfit_fast.") + name +
                             ": the tensors are too large for one launch");
  const dim3 grid(static_cast<unsigned>(blocks.x), static_cast<unsigned>(blocks.y));
#ifdef __CUDACC__
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<P>(arguments)...);
  check(name, cudaGetLastError());
#else
  run_kernel_on_cpu(kernel, grid, block, 0, 0, static_cast<P>(arguments)...);
#endif
}

#ifdef __CUDACC__
// Of a launch whose blocks are in clusters of `cluster`, where that is more than 1.
struct LaunchConfig {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};

  LaunchConfig(unsigned blocks, unsigned threads, int64_t shared_bytes, unsigned cluster) {
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.attrs = attributes;
    if (cluster > 1) add(cudaLaunchAttributeClusterDimension).clusterDim = {cluster, 1, 1};
  }
  LaunchConfig(const LaunchConfig&) = delete;  // config points into it

  cudaLaunchAttributeValue& add(cudaLaunchAttributeID id) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = id;
    return attribute.val;
  }
};

// Whether the device has no room for a cooperative launch. What the driver says of one with clusters is
// written nowhere: anything that is about room.
inline bool too_large(cudaError_t error, unsigned cluster) {
  return error == cudaErrorCooperativeLaunchTooLarge ||
         (cluster > 1 && (error == cudaErrorLaunchOutOfResources || error == cudaErrorInvalidClusterSize));
}

// Lets a kernel have as much dynamic shared memory as a block of this device may. Never less: the limit is
// the kernel's, and between one thread's setting and its launch another may launch the same kernel.
template <class... P>
cudaError_t allow_shared_memory(void (*kernel)(P...)) {
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

// How many clusters of a kernel run at once, which the driver does not guarantee; 0 where they cannot be
// launched.
template <class... P>
int active_clusters(void (*kernel)(P...), unsigned threads, int64_t shared_bytes, unsigned cluster) {
  const LaunchConfig launch(cluster, threads, shared_bytes, cluster);
  int count = 0;
  if (allow_shared_memory(kernel) == cudaSuccess &&
      cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config) == cudaSuccess) {
    return count;
  }
  cudaGetLastError();  // the answer is no; the next check is not to find the error
  return 0;
}
#endif

// All blocks run at once, each with `shared_bytes` of dynamic shared memory: they may wait for one another;
// or it throws LaunchTooLarge. cluster: how many neighbouring blocks reach each other's shared memory.
template <class... P>
void launch_cooperative(const char* name, void (*kernel)(P...), unsigned blocks, unsigned threads,
                        int64_t shared_bytes, unsigned cluster, void* stream, const P&... arguments) {
#ifdef __CUDACC__
  check(name, allow_shared_memory(kernel));
  LaunchConfig launch(blocks, threads, shared_bytes, cluster);
  launch.add(cudaLaunchAttributeCooperative).cooperative = 1;
  launch.config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&launch.config, kernel, arguments...);
  if (too_large(error, cluster)) {
    cudaGetLastError();  // as in check()
    throw LaunchTooLarge();
  }
  check(name, error);
#else
  const CardOnCpu card = card_on_cpu();
  if (blocks > card.granted || (cluster > 1 && blocks > cluster * card.granted_clusters))
    throw LaunchTooLarge();
  run_kernel_on_cpu(kernel, dim3(blocks), dim3(threads), shared_bytes, cluster, arguments...);
#endif
}
inline __device__ char* dynamic_shared_memory() {
#ifdef __CUDACC__
  extern __shared__ __align__(16) char memory[];
  return memory;
#else
  return BlocksOnCpu::current()->shared_memory();
#endif
}

// One thread for each of n items.
template <class... P, class... A>
void launch_over(int64_t n, const char* name, void (*kernel)(P...), void* stream, A... arguments) {
  constexpr int kThreads = 256;
  launch(name, kernel, Grid{ceil_div(n, kThreads)}, dim3(kThreads), stream, arguments...);
}
inline __device__ int64_t item_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }

// One warp for each of n rows: rows of hundreds of elements, which the lanes share out.
template <class... P, class... A>
void launch_warps(int64_t n, const char* name, void (*kernel)(P...), void* stream, A... arguments) {
  constexpr int kWarps = 8;
  launch(name, kernel, Grid{ceil_div(n, kWarps)}, dim3(kWarp, kWarps), stream, arguments...);
}
inline __device__ int64_t warp_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; }

// One thread for each element of a (rows, columns) matrix: no division to find its place.
template <class... P, class... A>
void launch_matrix(int64_t rows, int64_t columns, const char* name, void (*kernel)(P...), void* stream,
                   A... arguments) {
  constexpr int kThreads = 128;
  launch(name, kernel, Grid{rows, ceil_div(columns, kThreads)}, dim3(kThreads), stream, arguments...);
}
inline __device__ int64_t matrix_column() {
  return static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x;
}

}  // namespace ulmfit_fast::cuda
