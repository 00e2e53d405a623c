// Groups of threads that share a sample: a warp, a block, or a cluster of blocks.
#pragma once

#include <cooperative_groups.h>

#include "common/launch.cuh"

namespace robustkern {

constexpr int kWarp = 32;  // threads

struct Sum {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return a + b;
  }
};

struct LargerOrNan {
  template <class V>
  __device__ V operator()(V a, V b) const {
    return a > b || a != a ? a : b;
  }
};

// kLanes threads, a warp or a whole block, in each of kBlocks blocks.
template <int kLanesOf, int kBlocksOf = 1>
struct Group {
  static constexpr int kLanes = kLanesOf, kBlocks = kBlocksOf;
  static constexpr int kThreadsPerBlock = kLanes == kWarp ? kBlockThreads : kLanes;

  static __device__ int64_t index() { return thread_index() / (kLanes * kBlocks); }
  static __device__ int block() { return blockIdx.x % kBlocks; }
  static __device__ int lane() { return threadIdx.x % kLanes; }

  // All threads' values combined, in an order that never changes. All threads must call it.
  template <class Combine, class V>
  static __device__ V reduce(Combine combine, V value) {
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      value = combine(value, __shfl_xor_sync(~0u, value, distance));
    }
    if constexpr (kLanes > kWarp) {
      constexpr int kWarps = kLanes / kWarp;
      __shared__ V of_warps[kWarps];
      if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
      __syncthreads();
      value = of_warps[0];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) value = combine(value, of_warps[w]);
      __syncthreads();  // from here on the memory may be used again
    }
#if __CUDA_ARCH__ >= 900
    if constexpr (kBlocks > 1) {
      __shared__ V of_block;
      const auto cluster = cooperative_groups::this_cluster();
      if (threadIdx.x == 0) of_block = value;
      cluster.sync();
      value = *cluster.map_shared_rank(&of_block, 0);
#pragma unroll
      for (int b = 1; b < kBlocks; ++b) {
        value = combine(value, *cluster.map_shared_rank(&of_block, b));
      }
      cluster.sync();  // until all have read it, no block must end or write again
    }
#endif
    return value;
  }
};

using WarpGroup = Group<kWarp>;
using BlockGroup = Group<kBlockThreads>;
// Two or three such blocks fit a multiprocessor, so that one loads while another waits; the samples
// that are under way then fit the caches.
using ClusterGroup = Group<512, 8>;

}  // namespace robustkern
