#include "instances.cuh"

DETERMINISTIC_INSTANCES(float, f32)
