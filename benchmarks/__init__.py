"""What is fast, and how we know: one script for each question; shared/ is what they share."""
import os

# What torch's profiler has to say of itself, and of memory that was there before it; it reads this when it is imported.
os.environ.setdefault('KINETO_LOG_LEVEL', '99')
os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')
