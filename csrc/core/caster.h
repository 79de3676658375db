// SPDX-License-Identifier: MIT
// torch.Tensor -> TensorRef without torch headers. The only file of csrc that knows how torch looks from Python.
//
// A binding takes TensorArg and gets at the memory only through as("name"), so every refusal names its argument.
// Fast path: the function table of DLPack's C exchange (torch >= 2.10), about 20 ns a tensor; otherwise attributes.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "check.h"

namespace dalle_fast {

namespace dlpack {  // the few plain structs of DLPack 1.x that the fast path reads

struct DLTensor {
  void* data;
  struct {
    int32_t type;
    int32_t id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  void* previous;
  void* allocator;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);
  void* current_stream;
};

}  // namespace dlpack

// Python objects looked up once; leaked on purpose, they live as long as the process.
struct TorchNames {
  PyTypeObject* tensor;
  PyTypeObject* parameter;
  PyObject* plain_dispatch;  // __torch_dispatch__ of types that do not intercept
  const dlpack::ExchangeApi* exchange = nullptr;
  PyObject *dispatch, *is_neg, *strided;

  static const TorchNames& get() {
    static TorchNames* names = new TorchNames();  // guarded by the GIL: bindings cast before they release it
    return *names;
  }

 private:
  TorchNames() {
    namespace py = pybind11;
    const py::object torch = py::module_::import("torch");
    const auto keep = [](py::object object) { return object.release().ptr(); };
    const auto name = [](const char* text) { return PyUnicode_InternFromString(text); };
    tensor = reinterpret_cast<PyTypeObject*>(keep(torch.attr("Tensor")));
    parameter = reinterpret_cast<PyTypeObject*>(keep(torch.attr("nn").attr("Parameter")));
    plain_dispatch = keep(torch.attr("Tensor").attr("__torch_dispatch__"));
    strided = keep(torch.attr("strided"));
    dispatch = name("__torch_dispatch__");
    is_neg = name("is_neg");
    if (py::hasattr(torch.attr("Tensor"), "__dlpack_c_exchange_api__")) {
      const py::object capsule = torch.attr("Tensor").attr("__dlpack_c_exchange_api__");
      auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
      if (!api) PyErr_Clear();
      if (api && api->major == 1) exchange = api;
    }
  }
};

class TensorArg {
 public:
  TensorArg() = default;
  explicit TensorArg(pybind11::handle object) : object_(object) {}

  bool is_none() const { return object_.is_none(); }

  // The tensor's memory and layout. Throws TypeError or ValueError that begins with `name`.
  TensorRef as(const char* name) const {
    refuse_foreign(name);
    TensorRef t;
    if (!read_exchange(&t, name)) read_attributes(&t, name);
    if (!t.data && t.numel() > 0)
      throw std::invalid_argument(std::string(name) + ": the tensor's storage has been freed or was never allocated");
    return t;
  }

 private:
  void refuse_foreign(const char* name) const {
    const TorchNames& names = TorchNames::get();
    PyObject* object = object_.ptr();
    PyTypeObject* type = Py_TYPE(object);
    if (type != names.tensor && type != names.parameter) {
      if (!PyType_IsSubtype(type, names.tensor))
        throw TypeError(std::string(name) + ": expected a torch.Tensor, got " + type->tp_name);
      pybind11::object dispatch =
          pybind11::reinterpret_steal<pybind11::object>(PyObject_GetAttr((PyObject*)type, names.dispatch));
      if (!dispatch) throw pybind11::error_already_set();
      if (dispatch.ptr() != names.plain_dispatch)  // FakeTensor, DTensor: no memory of their own
        throw TypeError(std::string(name) + ": expected a tensor with memory of its own, got " + type->tp_name);
    }
    // Lazy views hold other values than their memory; the dispatcher resolves them before it calls an op.
    if (is_true(object, names.is_neg))
      throw std::invalid_argument(std::string(name) + ": got a negative-bit view; call resolve_neg() first");
  }

  static bool is_true(PyObject* object, PyObject* method) {
    PyObject* answer = PyObject_CallMethodNoArgs(object, method);
    if (!answer) throw pybind11::error_already_set();
    const bool yes = answer == Py_True;
    Py_DECREF(answer);
    return yes;
  }

  bool read_exchange(TensorRef* t, const char* name) const {
    const dlpack::ExchangeApi* api = TorchNames::get().exchange;
    if (!api || !api->tensor_from_object) return false;
    dlpack::DLTensor d;
    if (api->tensor_from_object(object_.ptr(), &d) != 0) {
      PyErr_Clear();  // meta, sparse, complex views: the attribute path explains what is wrong
      return false;
    }
    if (d.dtype.lanes != 1 || d.ndim > kMaxRank) return false;
    switch (d.device.type) {
      case 1: t->device = {DeviceType::kCPU, 0}; break;
      case 2: t->device = {DeviceType::kCUDA, d.device.id}; break;
      default: return false;
    }
    const int kind = d.dtype.code * 1000 + d.dtype.bits;
    switch (kind) {
      case 2032: t->dtype = DType::kFloat32; break;
      case 2064: t->dtype = DType::kFloat64; break;
      case 2016: t->dtype = DType::kFloat16; break;
      case 4016: t->dtype = DType::kBFloat16; break;
      case 64: t->dtype = DType::kInt64; break;
      case 32: t->dtype = DType::kInt32; break;
      case 1016: t->dtype = DType::kUInt16; break;
      case 1008: t->dtype = DType::kUInt8; break;
      case 6008: t->dtype = DType::kBool; break;
      default: return false;
    }
    (void)name;
    t->data = static_cast<char*>(d.data) + d.byte_offset;
    if (!d.data) t->data = nullptr;
    t->rank = d.ndim;
    int64_t dense = 1;
    for (int i = d.ndim - 1; i >= 0; --i) {
      t->shape[i] = d.shape[i];
      t->stride[i] = d.strides ? d.strides[i] : dense;
      dense *= d.shape[i];
    }
    return true;
  }

  void read_attributes(TensorRef* t, const char* name) const {
    const TorchNames& names = TorchNames::get();
    const std::string prefix = std::string(name) + ": ";
    if (pybind11::object(object_.attr("layout")).ptr() != names.strided)
      throw TypeError(prefix + "expected a strided tensor, got layout " +
                      std::string(pybind11::str(object_.attr("layout"))));
    const std::string device = pybind11::str(object_.attr("device").attr("type"));
    if (device == "cpu") {
      t->device = {DeviceType::kCPU, 0};
    } else if (device == "cuda") {
      t->device = {DeviceType::kCUDA, object_.attr("device").attr("index").cast<int>()};
    } else {
      throw std::invalid_argument(prefix + "expected a tensor on cpu or cuda, got one on " + device);
    }
    const std::string dtype = pybind11::str(object_.attr("dtype"));
    static constexpr DType kAll[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16, DType::kInt64,
                                     DType::kInt32,   DType::kUInt16,  DType::kUInt8,   DType::kBool};
    bool known = false;
    for (DType candidate : kAll) {
      if (dtype == std::string("torch.") + name_of(candidate)) {
        t->dtype = candidate;
        known = true;
      }
    }
    if (!known) throw TypeError(prefix + "dtype " + dtype + " is not supported");
    t->rank = object_.attr("dim")().cast<int>();
    if (t->rank > kMaxRank)
      throw std::invalid_argument(prefix + "expected at most 8 dimensions, got " + std::to_string(t->rank));
    const pybind11::tuple shape = object_.attr("shape");
    const pybind11::tuple stride = object_.attr("stride")();
    for (int i = 0; i < t->rank; ++i) {
      t->shape[i] = shape[i].cast<int64_t>();
      t->stride[i] = stride[i].cast<int64_t>();
    }
    t->data = reinterpret_cast<void*>(object_.attr("data_ptr")().cast<uintptr_t>());
  }

  pybind11::handle object_;
};

}  // namespace dalle_fast

namespace pybind11::detail {

// Borrows the argument; as() does the work, because only the binding knows the argument's name.
template <>
struct type_caster<dalle_fast::TensorArg> {
  PYBIND11_TYPE_CASTER(dalle_fast::TensorArg, const_name("torch.Tensor"));
  bool load(handle source, bool) {
    value = dalle_fast::TensorArg(source);
    return true;
  }
};

}  // namespace pybind11::detail
