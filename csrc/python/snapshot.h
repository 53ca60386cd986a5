// Whether Python objects are unchanged, for the kernels' views of a model's layers: checked at every step, when weights
// have evicted all of these objects from the caches.
#pragma once

#include <nanobind/nanobind.h>

namespace olmoe {

// dicts[i][keys[i]] is values[i], type(objects[i]) is types[i] and len(counted[i]) == counts[i], for all i. `dicts` and
// `counted` hold dicts. Holds no references: the lists stay with Python, whose garbage collector sees them.
bool unchanged(const nanobind::list& dicts, const nanobind::list& keys, const nanobind::list& values,
               const nanobind::list& objects, const nanobind::list& types, const nanobind::list& counted,
               const nanobind::list& counts);

// Where tensors lie, their dtypes, shapes and strides, as bytes to compare; None where one of them cannot be described.
// `api` is the capsule of DLPack's C exchange API, which the type of all of the tensors offers.
nanobind::object layout(const nanobind::capsule& api, const nanobind::list& tensors);

}  // namespace olmoe
