// SPDX-License-Identifier: MIT
// What csrc knows of a tensor: a pointer, sizes and strides. Free of torch and of Python.
#pragma once

#include <cstdint>

namespace dalle_fast {

enum class DType : uint8_t {
  kFloat32,
  kFloat64,
  kFloat16,
  kBFloat16,
  kInt64,
  kInt32,
  kUInt16,
  kUInt8,
  kBool,
};

enum class DeviceType : uint8_t { kCPU, kCUDA };

struct Device {
  DeviceType type = DeviceType::kCPU;
  int index = 0;
  bool is_cuda() const { return type == DeviceType::kCUDA; }
  bool operator==(const Device& other) const { return type == other.type && index == other.index; }
};

inline constexpr int kMaxRank = 8;

struct TensorRef {
  void* data = nullptr;
  int64_t shape[kMaxRank] = {};
  int64_t stride[kMaxRank] = {};  // in elements
  int rank = 0;
  DType dtype = DType::kFloat32;
  Device device;

  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
  bool is_contiguous() const {
    int64_t expected = 1;
    for (int i = rank - 1; i >= 0; --i) {
      if (shape[i] != 1 && stride[i] != expected) return numel() == 0;
      expected *= shape[i];
    }
    return true;
  }
  // Every element between the first and the last is its own: any permutation of contiguous dimensions.
  bool is_dense() const {
    int64_t expected = 1;
    bool seen[kMaxRank] = {};
    for (int k = 0; k < rank; ++k) {
      int next = -1;
      for (int i = rank - 1; i >= 0; --i)
        if (!seen[i] && (shape[i] == 1 || stride[i] == expected)) next = i;
      if (next < 0) return numel() == 0;
      seen[next] = true;
      expected *= shape[next];
    }
    return true;
  }
  // The same element at the same distance from the first; for tensors of the same shape.
  bool same_strides(const TensorRef& other) const {
    for (int i = 0; i < rank; ++i)
      if (shape[i] != 1 && stride[i] != other.stride[i]) return numel() == 0;
    return true;
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kFloat64: return "float64";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
    case DType::kInt64: return "int64";
    case DType::kInt32: return "int32";
    case DType::kUInt16: return "uint16";
    case DType::kUInt8: return "uint8";
    case DType::kBool: return "bool";
  }
  return "unknown";
}

}  // namespace dalle_fast
