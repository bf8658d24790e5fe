#include "instances.cuh"

INSTANCES(double, f64)
