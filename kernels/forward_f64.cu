#include "instances.cuh"

FORWARD_INSTANCES(double, f64)
