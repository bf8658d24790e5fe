#include "instances.cuh"

DETERMINISTIC_INSTANCES(__nv_bfloat16, bf16)
