"""`ColIntern3_5Processor` as the library uses it: the class of `processing_colintern`, as one of colpali-engine's.

`colintern export` copies `processing_colintern` into the folder of a model, where colpali-engine is not needed.
"""

from colpali_engine.utils.processing_utils import BaseVisualRetrieverProcessor

from colintern.modeling import processing_colintern


class ColIntern3_5Processor(processing_colintern.ColIntern3_5Processor, BaseVisualRetrieverProcessor):
    """Converts page images and query strings to right-padded batches for `ColIntern3_5`."""
