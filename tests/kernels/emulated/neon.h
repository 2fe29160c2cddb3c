// Any processor as the kernels see one of Arm's. Included before everything else, with arm_neon.h of this folder on the
// path: the system's own headers are read first, as what the processor is.
#pragma once

#include "plain.h"

#define __aarch64__ 1
