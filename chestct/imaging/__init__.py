"""From bytes to the square of grey values that a network sees. Imports neither torch nor anything above it."""
