#include "snapshot.h"

#include <string>

namespace nb = nanobind;

namespace olmoe {
namespace {

// DLPack's tensor and exchange API, version 1, as its specification has them (dmlc.github.io/dlpack); what is not used
// here is only as large.
struct DLTensor {
  void* data;
  int32_t device_type, device_id, dimensions;
  uint32_t dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLPackExchangeAPI {
  uint32_t major, minor;
  void *older, *allocate, *managed_from_object, *managed_to_object;
  int (*tensor_from_object)(void* object, DLTensor* out);  // -1 with a Python exception set
  void* current_stream;
};

constexpr Py_ssize_t kAhead = 12;

}  // namespace

bool unchanged(const nb::list& dicts, const nb::list& keys, const nb::list& values, const nb::list& objects,
               const nb::list& types, const nb::list& counted, const nb::list& counts) {
  const Py_ssize_t entries = PyList_GET_SIZE(dicts.ptr()), typed = PyList_GET_SIZE(objects.ptr());
  const Py_ssize_t sized = PyList_GET_SIZE(counted.ptr());
  if (PyList_GET_SIZE(keys.ptr()) != entries || PyList_GET_SIZE(values.ptr()) != entries ||
      PyList_GET_SIZE(types.ptr()) != typed || PyList_GET_SIZE(counts.ptr()) != sized)
    throw nb::value_error("lists of unequal length");
  auto item = [](const nb::list& list, Py_ssize_t i) { return PyList_GET_ITEM(list.ptr(), i); };  // borrowed
  // All of this is in memory, far apart, so what comes later is fetched while what comes now is compared.
  auto fetch = [&](const nb::list& list, Py_ssize_t i) {
    if (i < PyList_GET_SIZE(list.ptr())) __builtin_prefetch(item(list, i));
  };
  for (Py_ssize_t i = 0; i < entries; i++) {
    fetch(dicts, i + 2 * kAhead);
    if (i + kAhead < entries) {
      const auto* keys_of_later =
          reinterpret_cast<const char*>(reinterpret_cast<const PyDictObject*>(item(dicts, i + kAhead))->ma_keys);
      for (int line = 0; line < 4; line++) __builtin_prefetch(keys_of_later + 64 * line);
    }
    PyObject* found = PyDict_GetItemWithError(item(dicts, i), item(keys, i));
    if (!found && PyErr_Occurred()) throw nb::python_error();
    if (found != item(values, i)) return false;
  }
  for (Py_ssize_t i = 0; i < typed; i++) {
    fetch(objects, i + kAhead);
    if (reinterpret_cast<PyObject*>(Py_TYPE(item(objects, i))) != item(types, i)) return false;
  }
  for (Py_ssize_t i = 0; i < sized; i++) {
    fetch(counted, i + kAhead);
    if (PyDict_Size(item(counted, i)) != PyLong_AsSsize_t(item(counts, i))) return false;
  }
  return true;
}

nb::object layout(const nb::capsule& api, const nb::list& tensors) {
  const auto* exchange = static_cast<const DLPackExchangeAPI*>(api.data("dlpack_exchange_api"));
  if (exchange->major != 1) return nb::none();
  std::string bytes;
  auto add = [&](const void* data, size_t size) { bytes.append(static_cast<const char*>(data), size); };
  const Py_ssize_t count = PyList_GET_SIZE(tensors.ptr());
  for (Py_ssize_t i = 0; i < count; i++) __builtin_prefetch(PyList_GET_ITEM(tensors.ptr(), i));
  for (Py_ssize_t i = 0; i < count; i++) {
    DLTensor t{};
    if (exchange->tensor_from_object(PyList_GET_ITEM(tensors.ptr(), i), &t) != 0) {
      PyErr_Clear();
      return nb::none();
    }
    const uintptr_t address = reinterpret_cast<uintptr_t>(t.data) + t.byte_offset;
    const int32_t signature[] = {t.device_type, t.device_id, t.dimensions, int32_t(t.dtype)};
    add(&address, sizeof address), add(signature, sizeof signature);
    add(t.shape, sizeof(int64_t) * t.dimensions), add(t.strides, sizeof(int64_t) * t.dimensions);
  }
  return nb::bytes(bytes.data(), bytes.size());
}

}  // namespace olmoe
