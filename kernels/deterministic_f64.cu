#include "instances.cuh"

DETERMINISTIC_INSTANCES(double, f64)
