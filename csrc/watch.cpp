#include "watch.h"

namespace nb = nanobind;

namespace olmoe {

bool unchanged(const nb::list& dicts, const nb::list& keys, const nb::list& values, const nb::list& objects,
               const nb::list& types, const nb::list& counted, const nb::list& counts) {
  const Py_ssize_t entries = PyList_GET_SIZE(dicts.ptr()), typed = PyList_GET_SIZE(objects.ptr());
  const Py_ssize_t sized = PyList_GET_SIZE(counted.ptr());
  if (PyList_GET_SIZE(keys.ptr()) != entries || PyList_GET_SIZE(values.ptr()) != entries ||
      PyList_GET_SIZE(types.ptr()) != typed || PyList_GET_SIZE(counts.ptr()) != sized)
    throw nb::value_error("lists of unequal length");
  auto item = [](const nb::list& list, Py_ssize_t i) { return PyList_GET_ITEM(list.ptr(), i); };  // borrowed
  for (Py_ssize_t i = 0; i < entries; i++) {
    PyObject* found = PyDict_GetItemWithError(item(dicts, i), item(keys, i));
    if (!found && PyErr_Occurred()) throw nb::python_error();
    if (found != item(values, i)) return false;
  }
  for (Py_ssize_t i = 0; i < typed; i++)
    if (reinterpret_cast<PyObject*>(Py_TYPE(item(objects, i))) != item(types, i)) return false;
  for (Py_ssize_t i = 0; i < sized; i++)
    if (PyDict_Size(item(counted, i)) != PyLong_AsSsize_t(item(counts, i))) return false;
  return true;
}

}  // namespace olmoe
