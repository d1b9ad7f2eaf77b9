"""Publishes a memory and reads it back into an empty cache; the arguments are its folder and the address."""

import os
import sys
from pathlib import Path

from pema.memory.places import MEMORY
from pema.storage.fetching import fetch
from pema.storage.publishing import publish

publish(Path(sys.argv[1]), sys.argv[2], MEMORY)
os.environ["PEMA_CACHE"] += "-2"
sys.stdout.write(str(fetch(sys.argv[2], MEMORY)))
