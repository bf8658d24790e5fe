#include "instances.cuh"

BACKWARD_INSTANCES(float, f32)
