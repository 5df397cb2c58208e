"""The study of SimMIM's paper: its forms and rows, its tables and pictures."""
