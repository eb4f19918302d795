"""What a generated video must follow besides its caption: reference frames, loops, score suffixes."""
