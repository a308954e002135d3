"""`ColIntern3_5Processor`: `ColIntern3_5RetrievalProcessor` as a processor of colpali-engine.

`colintern export` copies `processing_colintern` into the folder of a model, where colpali-engine is not needed.
"""

from colpali_engine.utils.processing_utils import BaseVisualRetrieverProcessor

from colintern.modeling.processing_colintern import ColIntern3_5RetrievalProcessor


class ColIntern3_5Processor(ColIntern3_5RetrievalProcessor, BaseVisualRetrieverProcessor):
    """Converts page images and query strings to right-padded batches for `ColIntern3_5`."""
