#include "instances.cuh"

INSTANCES(float, f32)
