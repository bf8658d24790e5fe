#include "instances.cuh"

INSTANCES(__half, f16)
