#include "build_facts.h"
