#include "instances.cuh"

BACKWARD_INSTANCES(double, f64)
