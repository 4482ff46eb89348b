"""Images and text in memory, their batches, and the distribution shifts of images."""

from trustjax.data.batches import Batches as Batches
from trustjax.data.batches import evaluation_batches as evaluation_batches
from trustjax.data.batches import iterate as iterate
from trustjax.data.conversations import InstructionDataset as InstructionDataset
from trustjax.data.conversations import PreferenceDataset as PreferenceDataset
from trustjax.data.conversations import hugging_face_instructions as hugging_face_instructions
from trustjax.data.conversations import hugging_face_preferences as hugging_face_preferences
from trustjax.data.images import DataError as DataError
from trustjax.data.images import ImageDataset as ImageDataset
from trustjax.data.images import digits as digits
from trustjax.data.images import hugging_face as hugging_face
from trustjax.data.images import unit_range as unit_range
from trustjax.data.packing import PackedTokens as PackedTokens
from trustjax.data.packing import pack as pack
from trustjax.data.shifts import SHIFTS as SHIFTS
from trustjax.data.shifts import parse_shift as parse_shift
from trustjax.data.splits import split as split
from trustjax.data.text import TextDataset as TextDataset
from trustjax.data.text import hugging_face_text as hugging_face_text
from trustjax.data.text import python_topics as python_topics
from trustjax.data.text import text_folder as text_folder
from trustjax.data.tokenizer import TokenBatch as TokenBatch
from trustjax.data.tokenizer import Tokenizer as Tokenizer
from trustjax.data.tokenizer import byte_tokenizer as byte_tokenizer
from trustjax.data.tokenizer import pretrained_tokenizer as pretrained_tokenizer
from trustjax.data.tokenizer import word_tokenizer as word_tokenizer
