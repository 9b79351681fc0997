#define STEPS tarsia_merge_portable
#include "body.h"
