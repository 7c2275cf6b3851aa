"""What is fast, and how we know: one script for each question; shared/ is what they share."""
import os

# torch's profiler reads these when it is imported; they silence what it says about itself.
os.environ.setdefault('KINETO_LOG_LEVEL', '99')
os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')
