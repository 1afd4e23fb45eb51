from lorasmith.contract import train_lora as train_lora
from lorasmith.lorafile import read as read
from lorasmith.lorafile import write as write

__version__: str
