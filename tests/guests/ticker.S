# A guest that counts interrupts: of the PIT and the RTC through the PICs, of a virtio-mmio slot through the second I/O APIC.
#
# Built flat to run at 0xF0000, 32-bit protected mode, paging off; kvm maps the end of the firmware there.
#
#   as --32 -o ticker.o ticker.S && ld -m elf_i386 -Ttext=0xF0000 --oformat binary -o ticker.bin ticker.o
#
# Status, little-endian u32 from 0x500:  PIT ticks, RTC ticks, virtio interrupts, last time of the RTC (hour minute second, BCD),
# interrupts of the RTC without a cause.
# On the serial port: A cold start, p for every 10 ticks of the PIT, r for every 8 of the RTC, v for every virtio interrupt,
# X for an interrupt that nobody expects.

        .set    STATUS, 0x500
        .set    PIT_TICKS, STATUS
        .set    RTC_TICKS, STATUS + 4
        .set    VIRTIO_TICKS, STATUS + 8
        .set    RTC_TIME, STATUS + 12
        .set    NO_CAUSE, STATUS + 16
        .set    IDT, 0x1000
        .set    STACK, 0x8000

        .set    LAPIC, 0xFEE00000
        .set    IOAPIC2, 0xFEC10000
        .set    SLOT0, 0xFEB00000

        .set    USE_PIT, 1
        .set    USE_RTC, 2
        .set    USE_VIRTIO, 4

        .code16
        .globl  _start
_start: jmp     real                    # the reset vector comes here

        .org    4
flags:  .long   0                       # which of USE_…; patched into the image

real:   cli
        mov     $0xF000, %ax
        mov     %ax, %ds
        lgdtl   gdtr - _start
        mov     %cr0, %eax
        or      $1, %al
        mov     %eax, %cr0
        ljmpl   $8, $protected

        .code32
protected:
        mov     $16, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        mov     $STACK, %esp
        cld
        mov     $STATUS, %edi
        xor     %eax, %eax
        mov     $8, %ecx
        rep stosl

        mov     $IDT, %edi              # every vector is unexpected, at first
        mov     $256, %ecx
1:      mov     $unexpected, %eax
        call    gate
        loop    1b
        mov     $IDT + 8 * 0x20, %edi
        mov     $pit, %eax
        call    gate
        mov     $IDT + 8 * 0x28, %edi
        mov     $rtc, %eax
        call    gate
        mov     $IDT + 8 * 0x30, %edi
        mov     $virtio, %eax
        call    gate
        lidt    idtr

        movl    $0x1FF, LAPIC + 0xF0    # local APIC on
        testl   $USE_PIT + USE_RTC, flags
        jz      3f
        movl    $0x700, LAPIC + 0x350   # LINT0 leads to the PICs
        mov     $pic_setup, %esi
        call    ports
        testl   $USE_RTC, flags
        jz      3f
        mov     $rtc_setup, %esi
        call    ports
3:      testl   $USE_VIRTIO, flags
        jz      4f
        movl    $0x11, IOAPIC2          # pin 0: to local APIC 0
        movl    $0, IOAPIC2 + 0x10
        movl    $0x10, IOAPIC2          # vector 0x30, level
        movl    $0x8030, IOAPIC2 + 0x10
4:      mov     $'A', %al
        call    print

        xor     %ebx, %ebx              # letters printed, of the PIT …
        xor     %ebp, %ebp              # … and of the RTC
idle:   sti
        hlt
done:   mov     $STACK, %esp            # handlers come here, interrupts off: hosts that emulate this mode have no iret
        mov     PIT_TICKS, %eax
        xor     %edx, %edx
        mov     $10, %ecx
        div     %ecx
        cmp     %eax, %ebx
        je      5f
        mov     %eax, %ebx
        mov     $'p', %al
        call    print
5:      mov     RTC_TICKS, %eax
        shr     $3, %eax
        cmp     %eax, %ebp
        je      idle
        mov     %eax, %ebp
        mov     $'r', %al
        call    print
        jmp     idle

# -- handlers

pit:    incl    PIT_TICKS
        mov     $0x20, %al
        out     %al, $0x20
        jmp     done

rtc:    mov     $0x0C, %al
        out     %al, $0x70
        in      $0x71, %al
        test    $0x80, %al
        jnz     1f
        incl    NO_CAUSE
1:      incl    RTC_TICKS
        mov     $4, %al
        call    cmos
        mov     %al, RTC_TIME + 2
        mov     $2, %al
        call    cmos
        mov     %al, RTC_TIME + 1
        mov     $0, %al
        call    cmos
        mov     %al, RTC_TIME
        mov     $0x20, %al
        out     %al, $0xA0
        out     %al, $0x20
        jmp     done

virtio: incl    VIRTIO_TICKS
        mov     SLOT0 + 0x60, %eax
        mov     %eax, SLOT0 + 0x64
        mov     $'v', %al
        call    print
        movl    $0, LAPIC + 0xB0
        jmp     done

unexpected:
        mov     $'X', %al
        call    print
        cli
        hlt
        jmp     unexpected

# -- helpers

gate:   push    %eax                    # an interrupt gate to %eax at %edi, which goes on to the next
        movw    %ax, (%edi)
        movw    $8, 2(%edi)
        movw    $0x8E00, 4(%edi)
        shr     $16, %eax
        movw    %ax, 6(%edi)
        add     $8, %edi
        pop     %eax
        ret

ports:  lodsw                           # pairs of port and byte at %esi, up to port 0
        test    %ax, %ax
        jz      1f
        mov     %eax, %edx
        lodsb
        out     %al, %dx
        jmp     ports
1:      ret

cmos:   out     %al, $0x70
        in      $0x71, %al
        ret

print:  push    %edx
        mov     $0x3F8, %dx
        out     %al, %dx
        pop     %edx
        ret

        .macro  port number, value
        .word   \number
        .byte   \value
        .endm

pic_setup:                              # master at vector 0x20, slave at 0x28; IRQ 0, 2 and 8 are open
        port    0x20, 0x11
        port    0xA0, 0x11
        port    0x21, 0x20
        port    0xA1, 0x28
        port    0x21, 4
        port    0xA1, 2
        port    0x21, 1
        port    0xA1, 1
        port    0x21, 0xFA
        port    0xA1, 0xFE
        port    0x43, 0x34              # the PIT: mode 2, 100 Hz
        port    0x40, 0x9B
        port    0x40, 0x2E
        .word   0

rtc_setup:
        port    0x70, 0x0A              # 64 Hz
        port    0x71, 0x2A
        port    0x70, 0x0B              # periodic interrupts
        port    0x71, 0x42
        .word   0

        .align  8
gdt:    .quad   0
        .quad   0x00CF9B000000FFFF
        .quad   0x00CF93000000FFFF
gdtr:   .word   gdtr - gdt - 1
        .long   gdt
idtr:   .word   8 * 256 - 1
        .long   IDT
