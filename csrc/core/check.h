// SPDX-License-Identifier: MIT
// Checks that guard memory: Python has already explained the user's mistakes, these catch what would corrupt.
// TypeError and std::invalid_argument (ValueError) cross to Python with the argument's name.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "tensor.h"

namespace dalle_fast {

struct TypeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline std::string to_string(const int64_t* values, int n) {
  std::string text = "[";
  for (int i = 0; i < n; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

inline void require_dtype(const TensorRef& t, const char* name, std::initializer_list<DType> allowed) {
  std::string list;
  for (DType dtype : allowed) {
    if (t.dtype == dtype) return;
    list += (list.empty() ? "" : " or ") + std::string(name_of(dtype));
  }
  throw TypeError(std::string(name) + ": expected dtype " + list + ", got " + name_of(t.dtype));
}

inline void require_rank(const TensorRef& t, const char* name, int rank) {
  if (t.rank != rank)
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(rank) + " dimensions, got shape " +
                                to_string(t.shape, t.rank));
}

// A size of -1 in `shape` accepts anything.
inline void require_shape(const TensorRef& t, const char* name, std::initializer_list<int64_t> shape) {
  bool ok = t.rank == static_cast<int>(shape.size());
  int i = 0;
  for (int64_t size : shape) {
    ok = ok && (size < 0 || t.shape[i] == size);
    ++i;
  }
  if (!ok)
    throw std::invalid_argument(std::string(name) + ": expected shape " +
                                to_string(shape.begin(), static_cast<int>(shape.size())) + ", got " +
                                to_string(t.shape, t.rank));
}

inline void require_contiguous(const TensorRef& t, const char* name) {
  if (!t.is_contiguous())
    throw std::invalid_argument(std::string(name) + ": expected a contiguous tensor, got strides " +
                                to_string(t.stride, t.rank));
}

// Kernels read rows with vector loads: the last dimension has to be dense.
inline void require_dense_rows(const TensorRef& t, const char* name) {
  if (t.numel() > 0 && t.rank > 0 && t.shape[t.rank - 1] > 1 && t.stride[t.rank - 1] != 1)
    throw std::invalid_argument(std::string(name) + ": expected stride 1 in the last dimension, got strides " +
                                to_string(t.stride, t.rank));
}

inline void require_same_device(const TensorRef& t, const char* name, const TensorRef& first, const char* first_name) {
  if (!(t.device == first.device))
    throw std::invalid_argument(std::string(name) + ": expected the device of " + first_name + ", got another");
}

inline void require_same_dtype(const TensorRef& t, const char* name, const TensorRef& first, const char* first_name) {
  if (t.dtype != first.dtype)
    throw TypeError(std::string(name) + ": expected the dtype of " + first_name + " (" + name_of(first.dtype) +
                    "), got " + name_of(t.dtype));
}

}  // namespace dalle_fast
