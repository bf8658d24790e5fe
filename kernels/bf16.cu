#include "instances.cuh"

INSTANCES(__nv_bfloat16, bf16)
