#pragma once

#include <nanobind/nanobind.h>

// The operations of training, in the module that bindings.cpp defines.
void bind_training(nanobind::module_& m);
