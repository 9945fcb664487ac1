"""What the scripts share."""

import logging

# The only remark of bitsandbytes at import is about a 4-bit kernel that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
