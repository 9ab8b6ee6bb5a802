"""What people look at: terminal output, later pictures and pages."""
