"""fastq's version, which its package metadata has too."""

__version__ = "0.1.0"
