#include "instances.cuh"

DETERMINISTIC_INSTANCES(__half, f16)
