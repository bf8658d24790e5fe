#include "instances.cuh"

FORWARD_INSTANCES(__nv_bfloat16, bf16)
