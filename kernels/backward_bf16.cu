#include "instances.cuh"

BACKWARD_INSTANCES(__nv_bfloat16, bf16)
