// What the CUDA kernels use of CUDA, on the CPU: a fiber for each thread of a block, one operating
// system thread for each block of a cluster, blocks outside of clusters one after the other.
//
// This shows that a kernel computes what it should and that its barriers suffice for the order in
// which fibers happen to run. It says nothing about speed, memory errors or races:
// compute-sanitizer on a device does.
#pragma once

// Torch's headers come before what is defined below.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <tuple>

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(threads)
#define __shared__ static thread_local
#define __CUDA_ARCH__ 900
#define CUDA CPU  // the dispatch key to register under

using std::sqrt;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x) : x(x) {}
};

// Of the fiber that runs.
extern thread_local dim3 threadIdx, blockIdx, blockDim;

// Waits for all threads of the block, or of the cluster.
void __syncthreads();
void emulated_cluster_barrier();
// What another block of the cluster has at the address that this one calls `own`.
void* emulated_map_shared(void* own, int block);
// Where the threads of a warp lay down what they exchange: room for 32 values of 8 bytes.
void* emulated_warp_values();
void emulated_warp_barrier();

template <class V>
V __shfl_xor_sync(unsigned, V value, int distance) {
  static_assert(sizeof(V) <= 8);
  auto* values = static_cast<V*>(emulated_warp_values());
  const unsigned lane = threadIdx.x % 32;
  values[lane] = value;
  emulated_warp_barrier();
  value = values[lane ^ static_cast<unsigned>(distance)];
  emulated_warp_barrier();
  return value;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorNoKernelImageForDevice };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrMultiProcessorCount };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrComputeCapabilityMajor ? 9 : 16;
  return cudaSuccess;
}

void emulated_launch(unsigned blocks, unsigned threads, unsigned cluster,
                     const std::function<void()>& thread);

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... parameters) {
  const unsigned cluster = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
  emulated_launch(config->gridDim.x, config->blockDim.x, cluster, [&] { kernel(parameters...); });
  return cudaSuccess;
}

// Torch without CUDA has no streams, no guard for the device that is the CPU, and no CUDA errors.
namespace torch::stable::accelerator {
struct EmulatedDeviceGuard {
  explicit EmulatedDeviceGuard(int) {}
};
}  // namespace torch::stable::accelerator
#define DeviceGuard EmulatedDeviceGuard
#define aoti_torch_get_current_cuda_stream(index, stream) (*(stream) = nullptr, 0)
#define torch_c10_cuda_check_msg(...) ((void)0)
