#include "instances.cuh"

FORWARD_INSTANCES(float, f32)
