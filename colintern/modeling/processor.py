"""Register `ColIntern3_5Processor` as one of colpali-engine's processors.

Not in `processing_colintern`, which `colintern export` copies into the folder of a model, where colpali-engine is not
needed.
"""

from colpali_engine.utils.processing_utils import BaseVisualRetrieverProcessor

from colintern.modeling.processing_colintern import ColIntern3_5Processor

BaseVisualRetrieverProcessor.register(ColIntern3_5Processor)
